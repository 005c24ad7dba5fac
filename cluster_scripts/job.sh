#!/bin/bash
# A job of LSF to change and send yourself, from the checkout:
#
#     bsub < cluster_scripts/job.sh
#
# LSF reads it from its standard input only: "bsub job.sh" would ignore all of its options. The launcher itself needs none
# of this: python launcher.py WORDS env=lsf renders and sends its own.
#
# Four lines are yours: the queue, the GPUs, the time limit, the words.
#BSUB -q general
#BSUB -gpu num=1
#BSUB -W 8:00
WORDS=(worker=main_lmim)
#
# Several seeds: an array, whose elements take their number as their seed, at most two at a time:
##BSUB -J sightline[1-5]%2
#BSUB -J sightline
#BSUB -n 4
#BSUB -R span[hosts=1]
#BSUB -o sightline.%J.%I.out
# Ten minutes before the limit USR2; the exit code 75 queues the job again.
#BSUB -wa USR2
#BSUB -wt 10
#BSUB -Q 75
#BSUB -r
# In docker: remove one #, and export LSF_DOCKER_VOLUMES, LSF_DOCKER_SHM_SIZE=16g, ... in the shell that calls bsub.
##BSUB -a docker(USER/sightline:1)

set -u
PYTHON=python3
[ ! -x .venv/bin/python ] || PYTHON=.venv/bin/python
[ -f launcher.py ] || { echo "job.sh: no launcher.py in $PWD; call bsub from the checkout" >&2; exit 2; }
[ "${LSB_JOBINDEX:-0}" -eq 0 ] || WORDS+=("seed=$LSB_JOBINDEX")

child='' again=0 ended=0
# shellcheck disable=SC2317  # the traps call it
leave() { [ -z "$child" ] || kill -TERM "$child" 2>/dev/null; } # to one process: the launcher tells its supervisors
trap 'again=1; leave' USR2
trap 'ended=1; leave' INT TERM

# A warning may not reach into a container: nine minutes before the limit it comes from here.
limit=$(sed -n 's/^#BSUB -W \([0-9]*\):\([0-9]*\)$/\1 \2/p' "$0" 2>/dev/null | head -n 1)
if [ -n "$limit" ]; then
    seconds=$(awk '{ print ($1 * 60 + $2 - 9) * 60 }' <<<"$limit")
    [ "$seconds" -le 0 ] || (sleep "$seconds" && kill -USR2 $$) >/dev/null 2>&1 &
    clock=$!
fi

"$PYTHON" -m launcher "${WORDS[@]}" env.scheduler=local --quiet &
child=$!
# wait returns when a trap runs: only a child that is gone has a code.
while :; do
    wait "$child"
    code=$?
    kill -0 "$child" 2>/dev/null || break
done
[ -z "${clock:-}" ] || kill "$clock" 2>/dev/null
[ "$code" -ne 0 ] || exit 0
if [ "$again" -eq 1 ] && [ "$ended" -eq 0 ]; then exit 75; fi
[ "$ended" -eq 0 ] || exit 130
exit "$code"
