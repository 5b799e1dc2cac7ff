#!/usr/bin/env bash
# A consistency model of CIFAR-10 on one GPU, in parts of at most 8 minutes:
#
#   bash examples/recipes/cifar10.sh teacher    an EDM denoiser, as long as one part allows
#   bash examples/recipes/cifar10.sh model      ECT from its weights; again and again, until it has seen all images
#   bash examples/recipes/cifar10.sh quality    Frechet distance, reconstructions, accuracy behind the defence
#   bash examples/recipes/cifar10.sh pack       all of it as files of 15 MB, OUT.part-*, to be carried elsewhere
#   bash examples/recipes/cifar10.sh unpack     and back
#
# A part goes on where the one before it stopped. MINUTES and IMAGES are those of one part and of the whole second stage,
# DEVICE is cuda where it is not said. quality wants the weights of two classifiers: RESNET56=FILE RESNET20=FILE, as
# safetensors. CIFAR-10 is found or fetched as docs/command-line.md says.
set -eu
out=${OUT:-runs/cifar10} minutes=${MINUTES:-7.5} images=${IMAGES:-6000000} device=${DEVICE:-cuda}
part=${1:?teacher, model, quality, pack or unpack}
shift
common=(--data cifar10 --hold-out 5000 --preset cifar10 --batch-size 512 --ema-half-life 100000,500000 --weights float16 --compile
  --checkpoint-every 500000 --minutes "$minutes" --device "$device")
case $part in
  teacher)
    cmap-defense train "${common[@]}" --objective edm --name cifar10-teacher --learning-rate 0.001 \
      --out "$out/teacher" "$@" ;;
  model)
    cmap-defense train "${common[@]}" --objective ect --from "$out/teacher/backbone" --name my-cifar10 \
      --learning-rate 0.0004 --images "$images" --out "$out/model" "$@" ;;
  quality)
    here=$(dirname "$0")/..
    cmap-defense quality --backbone "$out/model/backbone" --data cifar10 -n 512 --record --device "$device" \
      --classifier "$here/cifar_resnet.py:unit_resnet56" --weights "${RESNET56:?a safetensors file}" \
      --other "resnet20=$here/cifar_resnet.py:unit_resnet20@${RESNET20:?a safetensors file}" --out "$out/quality" "$@" ;;
  pack)
    rm -f "$out".part-*
    set -o pipefail
    tar -cf - --exclude=.lock -C "$out" . | split -b 15000000 -a 4 - "$out.part-" ;;
  unpack)
    mkdir -p "$out"
    cat "$out".part-* | tar -xf - -C "$out" ;;
  *)
    echo "There is no part $part: teacher, model, quality, pack or unpack." >&2
    exit 2 ;;
esac
