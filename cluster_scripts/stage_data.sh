#!/bin/bash
# Copy a directory or a file, or unpack an archive (tar, tar.gz, tar.zst, zip, ...), to this node's own disk and print
# the path:
#
#   data=$(cluster_scripts/stage_data.sh /datasets/imagenet.tar)
#
# Once per node: jobs that ask at the same time wait for the first, later ones find it there. It appears under its name
# only when it is complete. A source that changed (path, size, time of change) is staged anew.
# Where: $SLURM_TMPDIR if the site sets it (deleted with the job), else /tmp/USER (yours to delete); -t DIR for another.
# On all nodes of a job:  srun --ntasks-per-node=1 cluster_scripts/stage_data.sh SOURCE
set -euo pipefail

usage() {
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
}
fail() {
    printf 'stage_data.sh: %s\n' "$*" >&2
    exit 1
}

place=${SLURM_TMPDIR:-/tmp/$(id -un 2>/dev/null || id -u)} # $USER is not set everywhere
while getopts ht: option; do
    case $option in
        t) place=$OPTARG ;;
        h) usage && exit 0 ;;
        *) usage >&2 && exit 2 ;;
    esac
done
shift $((OPTIND - 1))
(($# == 1)) || { usage >&2 && exit 2; }

[ -e "$1" ] || fail "$1: no such file or directory"
source=$(realpath -- "$1")
place=$(realpath -m -- "$place")

(umask 077 && mkdir -p -- "$place") || fail "cannot make $place"
# /tmp is everybody's: a directory of that name made by another user is not to be trusted.
[ -O "$place" ] || fail "$place belongs to another user; choose another place with -t"

# Letters and digits only, so that the path can be put into a command or a config as it stands.
name=$(basename -- "$source" | tr -c 'A-Za-z0-9.\n' _ | tr -d '\n')
key=$(printf '%s\0' "$source" "$(stat -c '%s %Y' -- "$source")" | sha256sum)
target=$place/${name:0:60}-${key:0:12}

# Released by the kernel, whatever becomes of us; a tar that outlives a killed script keeps it until it is done.
exec 9>"$target.lock"
flock 9

if [ ! -e "$target" ]; then
    partial=$target.partial
    rm -rf -- "$partial" # of an attempt that was killed
    trap 'rm -rf -- "$partial"' EXIT
    trap 'exit 143' TERM INT HUP
    need=0
    [ -d "$source" ] || need=$(stat -c %s -- "$source") # a walk over a large directory would cost more than it saves
    free=$(df --output=avail -B1 -- "$place" | tail -n 1)
    ((need <= free)) || fail "$source needs at least $((need >> 20)) MB, and $place has $((free >> 20)) MB left"
    printf 'stage_data.sh: %s -> %s\n' "$source" "$target" >&2
    if [ -d "$source" ]; then
        mkdir -- "$partial"
        # Links are followed: what they lead to is what should be near.
        cp -RL --preserve=timestamps -- "$source/." "$partial/" || fail "could not copy $source"
    else
        case $source in
            *.tar | *.tar.* | *.tgz | *.tbz2 | *.txz | *.tzst)
                mkdir -- "$partial"
                # --force-local: a colon in the name would mean another host
                tar --force-local --no-same-owner -xf "$source" -C "$partial" || fail "could not unpack $source"
                ;;
            *.zip)
                mkdir -- "$partial"
                python3 -m zipfile -e "$source" "$partial" || fail "could not unpack $source"
                ;;
            *) cp -L -- "$source" "$partial" || fail "could not copy $source" ;;
        esac
    fi
    mv -T -- "$partial" "$target"
    trap - EXIT
fi

# An archive that holds one folder and nothing else: that folder is what was meant.
if [ -f "$source" ] && [ -d "$target" ]; then
    shopt -s nullglob dotglob
    inside=("$target"/*)
    if ((${#inside[@]} == 1)) && [ -d "${inside[0]}" ]; then
        target=${inside[0]}
    fi
fi
printf '%s\n' "$target"
