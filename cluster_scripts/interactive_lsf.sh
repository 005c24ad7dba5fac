#!/bin/bash
# A shell on a host of an LSF queue, in this folder; words after it replace the shell:
#
#     QUEUE=general-interactive IMAGE=user/image:tag GPUS=1 cluster_scripts/interactive_lsf.sh [COMMAND...]
#
# In docker, LSF_DOCKER_VOLUMES and the like count in the environment of this script.
set -eu
words=(-Is -n "${CPUS:-4}" -R "span[hosts=1]")
[ -z "${QUEUE:-}" ] || words+=(-q "$QUEUE")
[ -z "${GROUP:-}" ] || words+=(-G "$GROUP")
[ -z "${GPUS:-}" ] || words+=(-gpu "num=$GPUS")
[ -z "${IMAGE:-}" ] || words+=(-a "docker($IMAGE)")
# An enclosing job's own variables would be passed on as this one's.
for name in $(compgen -v | grep -E '^(LSB_|BSUB_|CUDA_VISIBLE_DEVICES$)' || true); do unset "$name"; done
[ $# -gt 0 ] || set -- /bin/bash
exec bsub "${words[@]}" "$@"
