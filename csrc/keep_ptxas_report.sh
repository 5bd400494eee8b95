#!/bin/sh
# Runs the CUDA compiler given as arguments and keeps its messages (ptxas: registers, spills) as <object>.ptxas.
previous= object=
for argument in "$@"; do
    [ "$previous" = -o ] && object=$argument
    previous=$argument
done
"$@" 2>"$object.ptxas"
status=$?
[ $status -eq 0 ] || cat "$object.ptxas" >&2
exit $status
