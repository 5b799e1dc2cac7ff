#!/usr/bin/env bash
# The backbone of the CMAP paper for ImageNet-100: the network of the published ImageNet-64 models (64 x 64, 192 channels,
# 3 residual blocks), unconditional, by consistency training with LPIPS, EMA of the target from 0.95 on, batch 1024,
# learning rate 1e-5 (arXiv 2412.08394).
#
#   IMAGENET100=/data/imagenet100 GPUS=8 bash examples/recipes/imagenet100.sh
#
# MICRO images go through the network at a time on each GPU; an image takes 0.6 GB of activations in bfloat16 and more
# for LPIPS. The kept average has a half-life of 25 million images, about that of the published ImageNet-64 models. The
# learning rate falls along a half cosine.
#
# IMAGENET100 has a folder train with one folder per class. LPIPS needs pip install 'cmap-defense[train,diffusers]' and
# VGG16's weights where torchvision looks for them; the error says where. IMAGES is the length; stopped, the same
# command goes on.
set -eu
out=${OUT:-runs/imagenet100} gpus=${GPUS:-1} images=${IMAGES:-100000000} micro=${MICRO:-32}
torchrun --nproc-per-node="$gpus" -m cmap_defense train --data "${IMAGENET100:?a folder of images}" --size 64 \
  --network imagenet64 --objective ct --objective-set "distance=${DISTANCE:-lpips}" --objective-set decay_start=0.95 \
  --objective-set levels_end=200 --batch-size 1024 --micro-batch "$micro" --ema-half-life 25000000 --learning-rate 0.00001 --images "$images" \
  --name imagenet100-ct --weights bfloat16 --checkpoint-every 1000000 --device cuda --out "$out" "$@"
