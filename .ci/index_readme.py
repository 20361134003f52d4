"""README.md as a package index shows it: nothing in it points at a file that is not there.

An index has the text alone. With the repository's address links to files lead there; without it, as long as the
project has no public one, they become the files' names, which are those in the sdist, and the picture goes: the tables
below it have its numbers.
"""

import re

NOTE = "The files that are named here, such as `docs/getting-started.md`, are in the sdist of this release."
# A link or a picture of Markdown whose target is neither an address nor a place on the page.
LINK = re.compile(r"(?P<picture>!?)\[(?P<text>[^\]\[]+)\]\((?P<file>(?!\w+:|#|//)[^)\s#]+)(?P<place>#[^)\s]*)?\)")
PICTURE = re.compile(r"<picture>.*?</picture>\n*", re.DOTALL)
SOURCE = re.compile(r"""(?P<before>\b(?:src|srcset)=")(?P<file>(?!\w+:|//)[^"]+)(?=")""")
# Code, in which nothing is a link.
CODE = re.compile(r"(^```.*?^```$|`[^`\n]+`)", re.DOTALL | re.MULTILINE)


def for_an_index(text: str, address: str | None = None, version: str | None = None) -> str:
    """The text of README.md for a package index.

    Args:
        text: README.md.
        address: The repository's address, such as "https://host/owner/name"; None where there is none.
        version: With an address, the release, whose tag the links lead to.

    Returns:
        The text, with links to addresses only.
    """
    if address is None:
        title, about, rest = PICTURE.sub("", text).split("\n\n", 2)
        text, target = "\n\n".join((title, about, NOTE, rest)), None
    else:
        target = f"{address.rstrip('/')}/{{}}/v{version}/"
        text = SOURCE.sub(lambda found: f"{found['before']}{target.format('raw')}{found['file']}", text)

    def link(found: re.Match[str]) -> str:
        if target is not None:
            place = f"{target.format('raw' if found['picture'] else 'blob')}{found['file']}{found['place'] or ''}"
            return f"{found['picture']}[{found['text']}]({place})"
        if found["picture"] or found["text"] == found["file"]:
            return found["text"]
        return f"{found['text']} (`{found['file']}`)"

    # Every second part is code.
    parts = CODE.split(text)
    parts[::2] = [LINK.sub(link, part) for part in parts[::2]]
    return "".join(parts)
