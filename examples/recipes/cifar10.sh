#!/usr/bin/env bash
# A consistency model of CIFAR-10 on one GPU, in three kinds of parts of at most 8 minutes:
#
#   bash examples/recipes/cifar10.sh teacher    an EDM denoiser, as long as one part allows
#   bash examples/recipes/cifar10.sh model      ECT from its weights; again and again, until it has seen all images
#   bash examples/recipes/cifar10.sh quality    Frechet distance, reconstructions, accuracy behind the defence
#
# A part goes on where the one before it stopped. It needs nothing but the folder in OUT, whose checkpoints are files of
# at most 15 MB, so the next part may run on another machine. MINUTES and IMAGES are those of one part and of the whole
# second stage. CIFAR-10 is found or fetched as docs/command-line.md says.
set -eu
out=${OUT:-runs/cifar10} minutes=${MINUTES:-7.5} images=${IMAGES:-6000000}
part=${1:?teacher, model or quality}
shift
common=(--data cifar10 --preset cifar10 --batch-size 512 --ema-half-life 100000,500000 --weights float16 --compile
  --checkpoint-every 500000 --checkpoint-part-mb 15 --minutes "$minutes")
case $part in
  teacher)
    cmap-defense train "${common[@]}" --objective edm --name cifar10-teacher --learning-rate 0.001 \
      --out "$out/teacher" "$@" ;;
  model)
    cmap-defense train "${common[@]}" --objective ect --from "$out/teacher/backbone" --name cifar10-ct-small \
      --learning-rate 0.0004 --images "$images" --out "$out/model" "$@" ;;
  quality)
    here=$(dirname "$0")/..
    cmap-defense quality --backbone "$out/model/backbone" --data cifar10 -n 512 --record --out "$out/quality" \
      --classifier "$here/cifar_resnet.py:unit_resnet56" "$@" ;;
  *)
    echo "There is no part $part: teacher, model or quality." >&2
    exit 2 ;;
esac
