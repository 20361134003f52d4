#!/usr/bin/env bash
# bochscpu-python: the wheel tagged manylinux_2_28 cannot be imported with the glibc that the tag promises.
#
# Expected: what a wheel tagged manylinux_2_28 needs is in glibc 2.28 (PEP 600), so pip installs it there and it works.
# Seen: pip installs it on Debian 12 (glibc 2.36), and the import fails: the extension module asks for __isoc23_strtoull
# and __isoc23_sscanf, which glibc has since 2.38. They carry no version, as they come from a static library inside that
# was compiled against newer headers than the module was linked with; so a check of symbol versions (auditwheel's, for
# one) sees nothing above GLIBC_2.28.
#
# Versions: bochscpu-python 0.4.0 (manylinux x86-64), Python 3.11, glibc 2.36 (Debian 12). Seen on 2026-11-30.
# Output seen:
#     newest version of glibc asked for: GLIBC_2.28; names of glibc 2.38 without a version: 2
#     import with glibc 2.36: undefined symbol
# Exit status 0 while this is so, 1 once it has changed; with glibc 2.38 or newer the import is not tried.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet bochscpu-python==0.4.0
module=$(echo "$work"/venv/lib/python3*/site-packages/bochscpu/_bochscpu*.so)
newest=$(objdump -T "$module" | grep -o 'GLIBC_2\.[0-9]*' | sort -uV | tail -1)
names=$(nm -D --undefined-only "$module" | grep -c ' __isoc23_[a-z]*$' || true)
echo "newest version of glibc asked for: $newest; names of glibc 2.38 without a version: $names"
glibc=$(getconf GNU_LIBC_VERSION | cut -d" " -f2)
result="not tried"
if [ "$(printf '%s\n' "$glibc" 2.38 | sort -V | head -1)" != 2.38 ]; then
    result=$("$work/venv/bin/python" -c "import bochscpu" 2>&1 | grep -o "undefined symbol" || true)
fi
echo "import with glibc $glibc: $result"
[ "$newest" = GLIBC_2.28 ] && [ "$names" = 2 ] && { [ "$result" = "undefined symbol" ] || [ "$result" = "not tried" ]; }
