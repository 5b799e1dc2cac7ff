#!/usr/bin/env bash
# A consistency model of Fashion-MNIST on two CPU cores in under an hour: ECT from scratch, as long as 45 minutes allow.
# Stopped, the same command goes on. Fashion-MNIST is found or fetched as docs/command-line.md says.
set -eu
out=${OUT:-runs/fashion-mnist}
cmap-defense train --data fashion-mnist --hold-out 5000 --name my-fashion-mnist \
  --objective ect --preset small --batch-size 128 --learning-rate 0.0008 --ema-half-life 30000 \
  --weights float16 --compile --minutes 45 --out "$out" "$@"
