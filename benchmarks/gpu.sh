#!/usr/bin/env bash
# The GPU page of docs/benchmarks.md: every figure that is wanted, from one card, in at most 25 minutes.
#
#   bash benchmarks/gpu.sh all                    # or some of: rollout memory longest loss phases tests
#   OUT=figures bash benchmarks/gpu.sh memory     # JSON, logs and page.md lie in figures/; default: gpu-page
#   SIZE=tiny bash benchmarks/gpu.sh all          # small shapes, also on a CPU: does the script itself work?
#
# Needs no network: models have random weights and are written to MODELS (default OUT/models, 22 GB). A part that fails,
# or runs into its time limit, is said at the end and on the page, and the others go on; TIMES=3 makes limits three times
# as long. Packages that are looked for: vllm, trl, liger_kernel.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-gpu-page} SIZE=${SIZE:-card} PYTHON=${PYTHON:-python}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
MODELS=${MODELS:-$OUT/models}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
failed=()

if [ "$SIZE" = tiny ]; then
    TIMES=${TIMES:-6}  # a CPU, and a busy one
    ROLLOUT="--prompts 4 --slots 2 --prompt 16 --new 8 --mean 8"
    MEMORY="--policy tiny --reward-model tiny-7b --length 32 --new 12 --responses 4 --minibatch 2 --slots 2"
    LONGEST="--shape tiny-gemma --limit 30MiB --grain 256"
    LOSS="--tokens 64 --width 32 --vocabulary 512 --repeats 1 --threads 1"
    STEP=$MEMORY FIRST= SECOND= THIRD=
else
    TIMES=${TIMES:-1}
    ROLLOUT="--slots 64 --prompt 128 --new 512 --mean 256"
    MEMORY="--policy qwen2.5-3b --reward-model qwen2.5-7b --length 2048 --new 512 --slots 32"
    LONGEST="--shape gemma-3-1b --limit 79GiB"
    LOSS="--repeats 3"
    STEP="$MEMORY --responses 64 --minibatch 32 --slots 64"
    FIRST="--set memory_limit=11.5GiB" SECOND="--set memory_limit=7.5GiB" THIRD="--set memory_limit=5.7GiB"
fi

# run SECONDS NAME COMMAND...: its output in OUT/NAME.log
run() {
    local limit=$(($1 * TIMES)) name=$2 start=$SECONDS status=0
    shift 2
    echo "== $name, at most $limit s"
    timeout --kill-after=10 "$limit" "$@" >"$OUT/$name.log" 2>&1 || status=$?
    tail -n 30 "$OUT/$name.log"
    printf '{"name": "%s", "status": %d, "seconds": %d, "limit": %d}\n' \
        "$name" "$status" $((SECONDS - start)) "$limit" >"$OUT/$name.status.json"
    [ $status -eq 0 ] || failed+=("$name ($([[ $status = 124 || $status = 137 ]] && echo time limit || echo "exit $status"))")
}

rollout() {
    run 330 rollout "$PYTHON" benchmarks/rollout.py --prompts 128 $ROLLOUT --repeats 1 \
        --contenders generate,paged,vllm --json "$OUT/rollout.json"
    run 150 rollout-others "$PYTHON" benchmarks/rollout.py --prompts 64 $ROLLOUT --repeats 1 \
        --contenders hf,static --json "$OUT/rollout-others.json"
}

memory() {
    local later=(--phase train-rm --phase "rl rollout" --phase "rl score" --phase "rl update" --models "$MODELS")
    run 240 memory "$PYTHON" benchmarks/memory.py $MEMORY $FIRST --set residency=all \
        --models "$MODELS" --json "$OUT/memory.json"
    run 140 memory-residency "$PYTHON" benchmarks/memory.py $MEMORY $SECOND --set residency=phase \
        "${later[@]}" --json "$OUT/memory-residency.json"
    run 140 memory-streamed "$PYTHON" benchmarks/memory.py $MEMORY $THIRD --set residency=phase \
        --set reward_model.streaming=true "${later[@]}" --json "$OUT/memory-streamed.json"
}

longest() {
    run 150 longest "$PYTHON" benchmarks/memory.py longest $LONGEST --models "$MODELS" --json "$OUT/longest.json"
}

loss() {
    run 80 loss "$PYTHON" benchmarks/loss.py $LOSS --json "$OUT/loss.json"
}

# the share of sampling in a step: 64 prompts, 512 new tokens each
phases() {
    run 60 phases-models "$PYTHON" benchmarks/memory.py write $STEP --steps 2 --models "$MODELS" --out "$OUT/step"
    rm -rf "$OUT/step/runs"
    run 130 phases "$PYTHON" benchmarks/phases.py "$OUT/step/recipe.yaml" --runs "$OUT/step/runs" --out "$OUT/phases.json"
}

# the files with tests that a CPU skips
tests() {
    run 80 tests "$PYTHON" -m pytest -q -n 0 -rs -m "not slow" \
        $(grep -rlE "needs a GPU|needs CUDA" tests --include='test_*.py' | sort) tests/rollout
}

parts=("${@:-all}")
[ "${parts[0]}" != all ] || parts=(rollout memory longest loss phases tests)
for part in "${parts[@]}"; do
    case $part in
        rollout | memory | longest | loss | phases | tests) "$part" ;;
        *) echo "no part '$part': rollout, memory, longest, loss, phases, tests or all" >&2; exit 2 ;;
    esac
done
"$PYTHON" benchmarks/page.py "$OUT" || failed+=(page)
[ ${#failed[@]} -eq 0 ] || { printf 'failed: %s\n' "${failed[@]}" >&2; exit 1; }
