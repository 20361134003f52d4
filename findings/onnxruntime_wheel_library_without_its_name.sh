#!/usr/bin/env bash
# ONNX Runtime's Python wheel: a second copy of the runtime, for C and C++, that no program linked with it finds.
#
# Expected: a shared library in a wheel is one that something there loads, or one that a program can be linked with as it
# lies: under the name that it gives itself (its SONAME), or beside a link of that name.
# Seen: onnxruntime/capi holds libonnxruntime.so.VERSION, whose SONAME is libonnxruntime.so.1. No file and no link has
# that name, so a program that was linked with it does not start ("cannot open shared object file"), also with that
# folder in its search path; with a link of the right name it does. Python's own module holds the whole runtime once
# more, needs nothing of that file, and does not export OrtGetApiBase. Together the two are about 60 MB of the 68 that
# the package takes. Headers are not among the files.
#
# Versions: onnxruntime 1.31.1 (manylinux x86-64), Python 3.11, Debian 12. Seen on 2026-11-30.
# Output seen:
#     SONAME libonnxruntime.so.1; a file of that name: no; Python's module needs it: no; exports the C interface: no
#     linked with it: does not start; with a link of its name: starts
# Exit status 0 while this is so, 1 once it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet onnxruntime==1.31.1 numpy==2.4.6
cd "$work"
capi=$(echo venv/lib/python3*/site-packages/onnxruntime/capi)
library=$(echo "$work/$capi"/libonnxruntime.so.*)
module=$(echo "$work/$capi"/onnxruntime_pybind11_state*.so)
soname=$(objdump -p "$library" | awk '$1 == "SONAME" { print $2 }')
yes_no() { if "$@" > /dev/null 2>&1; then echo yes; else echo no; fi; }
needs() { objdump -p "$module" | grep -q "NEEDED.*libonnxruntime"; }
exports() { objdump -T "$module" | grep -v UND | grep -q OrtGetApiBase; }
cat > program.c <<'C'
#include <stdio.h>
typedef struct { const void *(*api)(unsigned); const char *(*version)(void); } base;
extern const base *OrtGetApiBase(void);
int main(void) { puts(OrtGetApiBase()->version()); return 0; }
C
cc program.c -o program "$library" -Wl,-rpath,"$work/$capi" -Wl,-rpath,"$work/named"
starts() { if ./program > /dev/null 2>&1; then echo starts; else echo "does not start"; fi; }
as_it_lies=$(starts)
mkdir named
ln -s "$library" "named/$soname"
seen="SONAME $soname; a file of that name: $(yes_no test -e "$work/$capi/$soname"); Python's module needs it: $(yes_no needs); exports the C interface: $(yes_no exports)
linked with it: $as_it_lies; with a link of its name: $(starts)"
echo "$seen"
[ "$seen" = "SONAME libonnxruntime.so.1; a file of that name: no; Python's module needs it: no; exports the C interface: no
linked with it: does not start; with a link of its name: starts" ]
