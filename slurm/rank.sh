#!/usr/bin/env bash
# One rank of a step: rank.sh NAME COMMAND...; writes how it ended to NAME-<rank>.code, if it ended by itself.
code=$1-$SLURM_PROCID.code
shift
trap : TERM USR1  # Slurm signals the whole task: the command hears it, and this shell waits for what it does
"$@"
ended=$?
[ "$ended" -ge 128 ] || echo "$ended" >"$code"
exit "$ended"
