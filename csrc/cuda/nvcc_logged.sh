#!/bin/sh
# Runs the compiler as given and keeps what it says beside the object file, as OBJECT.log, which bench/cuda_resources.py
# reads. What ptxas tells of each kernel is kept out of sight.
previous=
for argument; do
  [ "$previous" = -o ] && object=$argument
  previous=$argument
done
"$@" >"$object.log" 2>&1
status=$?
grep -v -e '^ptxas info' -e 'bytes stack frame' -e '^$' "$object.log" >&2
exit $status
