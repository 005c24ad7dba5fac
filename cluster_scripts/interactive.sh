#!/bin/bash
# A shell on a compute node, in the checkout, with the project's Python environment:
#
#   cluster_scripts/interactive.sh                                  one GPU, 4 cores, two hours
#   cluster_scripts/interactive.sh -p gpu --time=8:00:00 --mem=64G  any option of srun
#   cluster_scripts/interactive.sh -- python launcher.py doctor     a command instead of the shell
set -eu

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(dirname "$here")

if [ "${1:-}" = --on-the-node ]; then
    shift
    cd "$repo"
    activate=$repo/.venv/bin/activate
    if [ ! -r "$activate" ]; then
        echo "interactive.sh: no .venv in $repo; make install" >&2
        activate=/dev/null
    fi
    if (($#)); then
        # shellcheck disable=SC1090
        . "$activate"
        exec "$@"
    fi
    # After ~/.bashrc, which may set PATH anew.
    exec bash --rcfile <(printf '[ ! -r ~/.bashrc ] || . ~/.bashrc\n. %q\n' "$activate") -i
fi

case "${1:-}" in
    -h | --help)
        sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
        exit 0
        ;;
esac

options=()
while (($#)) && [ "$1" != -- ]; do
    options+=("$1")
    shift
done
(($# == 0)) || shift

pty=()
[ ! -t 0 ] || pty=(--pty) # not from a script: srun needs a terminal for it

exec srun --job-name=sightline-shell --nodes=1 --ntasks=1 --gpus-per-node=1 --cpus-per-task=4 --time=2:00:00 \
    ${options[@]+"${options[@]}"} ${pty[@]+"${pty[@]}"} bash "$here/interactive.sh" --on-the-node "$@"
