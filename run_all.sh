#!/usr/bin/env bash
# Every run of the tables, then the report. Finished runs are skipped, so the script can be stopped and started again.
#
#   ./run_all.sh digits                 a small version of each table on the embedded data, on a CPU
#   ./run_all.sh cifar10                the paper's settings (also: cifar100, transfer, all)
#   ./run_all.sh --dry-run cifar10      print every command, run nothing
#   NPROC=4 ./run_all.sh cifar10        each run on 4 GPUs (or processes) of this machine by torchrun; GPUS is the same
#   RESULTS=dir DATA=dir EXTRA="--epochs 2" ./run_all.sh digits    other folders; flags added to every training run
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
RESULTS=${RESULTS:-results} DATA=${DATA:-data} NPROC=${NPROC:-${GPUS:-1}} EXTRA=${EXTRA:-} PYTHON=${PYTHON:-python}
dry=false
failed=()

run() {  # run SCRIPT ARG...: one stage, by torchrun when NPROC > 1; a failure does not stop the others
    local script=$1; shift
    local command=("$PYTHON")
    [ "$NPROC" = 1 ] || command=("$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$NPROC")
    command+=("$here/$script" "$@")
    if $dry; then printf '%s\n' "${command[*]}"; return; fi
    printf '\n> %s\n' "${command[*]}"
    "${command[@]}" || failed+=("${command[*]}")
}
sat() { run sat.py --config "$here/configs/$config.yaml" --results "$RESULTS" --data-dir "$DATA" "$@" $EXTRA; }
ranking() { run rank.py --config "$here/configs/$config.yaml" --results "$RESULTS" --data-dir "$DATA" "$@"; }
transfer() { run transfer.py "$@" --results "$RESULTS" --data-dir "$DATA" $EXTRA; }

orders() {  # orders SIZES SEEDS COMMAND...: the command for each size and order; random once for each of the seeds
    local sizes=$1 seeds=$2 size seed; shift 2
    for size in $sizes; do
        "$@" "$size" --order hardest
        "$@" "$size" --order easiest
        for ((seed = 0; seed < seeds; seed++)); do "$@" "$size" --order random --seed "$seed"; done
    done
}

baselines() { sat --split none "$@"; sat --split full "$@"; }
csat() { orders "$1" "$2" sat "${@:3}" --split csat --size; }  # csat SIZES SEEDS [FLAG...]  (Fig. 5)
esat() { orders "$1" "$2" sat "${@:3}" --split esat --frac; }  # esat FRACS SEEDS [FLAG...]  (Fig. 6)

ssat_run() {  # ssat_run TARGETS NAME FLAG...: a source run called NAME, then its transfer to each target  (Fig. 8)
    local targets=$1 name=$2 target; shift 2
    sat --run "$name" "$@"
    for target in $targets; do
        transfer "$RESULTS/$source/$name/best.pt" --config "$here/configs/transfer/$target.yaml" $transfer_flags
    done
}
ssat_esat() {  # ssat_esat TARGETS FRAC --order ORDER [--seed SEED]: one source of S-ESAT, with the emphasis weights of Sec. 4.3
    ssat_run "$1" "source-esat-$4-$2-seed${6:-0}" "${source_flags[@]}" --split esat --weight emphasis --frac "${@:2}"
}
ssat() {  # ssat TARGETS FRACS SEEDS: S-ESAT with its two baselines
    ssat_run "$1" source-none-seed0 "${source_flags[@]}" --split none
    ssat_run "$1" source-full-seed0 "${source_flags[@]}" --split full
    orders "$2" "$3" ssat_esat "$1"
}

digits() {  # cheaper evaluation than the default: the two APGD attacks on 200 examples (the tables say so)
    local quick=(--eval-attacks apgd-ce apgd-t --eval-n 200)
    config=digits
    ranking
    baselines "${quick[@]}"
    csat "1 3 5 7" 2 "${quick[@]}"
    esat "0.1 0.3 0.5 0.7" 2 "${quick[@]}"
    source=digits0-4 source_flags=(--dataset digits0-4 "${quick[@]}") transfer_flags="${quick[*]}"
    ranking --dataset digits0-4
    ssat digits5-9 "0.1 0.3 0.5" 2
}
cifar10() {
    config=cifar10
    ranking
    baselines
    csat "1 2 3 4 5 6 7 8 9" 10
    esat "0.1 0.2 0.3 0.4 0.5 0.6 0.7 0.8 0.9" 10
}
cifar100() {
    config=cifar100
    ranking
    baselines
    csat "10 20 30 40 50 60 70 80 90" 5
    esat "0.1 0.2 0.3 0.4 0.5 0.6 0.7 0.8 0.9" 5
}
transfers() {  # S-ESAT, CIFAR-100 -> CIFAR-10
    config=cifar100 source=cifar100 source_flags=() transfer_flags=
    ranking
    ssat cifar10 "0.1 0.2 0.3 0.4 0.5 0.6 0.7 0.8 0.9" 5
}

main() {
    local sections=() section
    for section in "$@"; do
        case $section in
            --dry-run) dry=true ;;
            digits | cifar10 | cifar100) sections+=("$section") ;;
            transfer) sections+=(transfers) ;;
            all) sections+=(digits cifar10 cifar100 transfers) ;;
            *) echo "error: no section '$section'; valid: digits cifar10 cifar100 transfer all, and --dry-run" >&2; exit 2 ;;
        esac
    done
    [ ${#sections[@]} -gt 0 ] || { echo "error: name a section: digits cifar10 cifar100 transfer all (and --dry-run)" >&2; exit 2; }
    for section in "${sections[@]}"; do "$section"; done
    local command=("$PYTHON" "$here/report.py" --results "$RESULTS")
    if $dry; then printf '%s\n' "${command[*]}"; return; fi
    "${command[@]}"
    if [ ${#failed[@]} -gt 0 ]; then
        printf '\n%d failed:\n' "${#failed[@]}" >&2
        printf '  %s\n' "${failed[@]}" >&2
        exit 1
    fi
}
main "$@"
