#!/usr/bin/env bash
# Every run of the paper's figures, then the report. Finished runs are skipped, so it can be stopped and started again.
#
#   ./run_all.sh digits                    each figure in small, on the embedded data, on a CPU
#   ./run_all.sh cifar10 fig2 fig6         some figures of a data set at the paper's settings
#   ./run_all.sh cifar10-small             the paper's claims on 5,000 real images and a small network: hours on a CPU
#   ./run_all.sh all                       everything: cifar10 cifar100 imagenet200 transfer cifar10-small digits
#   ./run_all.sh --dry-run all             print every command, run nothing; ends with the number of runs and their cost
#   NPROC=4 ./run_all.sh cifar10           each run on 4 GPUs (or processes) of this machine by torchrun; GPUS is the same
#   RESULTS=dir DATA=dir PYTHON=python3 EXTRA="--epochs 2" ./run_all.sh digits     EXTRA is added to every training run
#
# Several copies over one RESULTS folder (one a GPU, or the tasks of a SLURM array) share the list: a run is claimed
# (mkdir) before it starts, rankings come first, a transfer waits for its source.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
RESULTS=${RESULTS:-results} DATA=${DATA:-data} NPROC=${NPROC:-${GPUS:-1}} EXTRA=${EXTRA:-} PYTHON=${PYTHON:-python}
dry=false stopped=false fig='' failed=() later=()
declare -A listed counted runs_of transfers_of new_of cost_of

# --- one stage ---------------------------------------------------------------------------------------------------------

stage() {  # stage FOLDER DONE COST SCRIPT ARG...: makes FOLDER/DONE unless it is there or another copy is making it
    local folder=$1 done_file=$1/$2 cost=$3 script=$4 command; shift 4
    count "$folder" "$script" "$cost"
    [ -z "${listed[$folder]:-}" ] || return 0  # another figure's run
    listed[$folder]=1
    command=("$PYTHON")
    [ "$NPROC" = 1 ] || command+=(-m torch.distributed.run --standalone --nproc-per-node "$NPROC" --)  # -- : or it takes our --run for its own
    command+=("$here/$script" "$@" --results "$RESULTS" --data-dir "$DATA")
    if $dry; then printf '%s\n' "${command[*]}"; return; fi
    claimed "$done_file" "$(claim_of "$folder")" "${command[@]}"
}
claimed() {  # claimed DONE_FILE CLAIM COMMAND...: runs the command if DONE_FILE is missing and the claim can be had
    local done_file=$1 claim=$2 log heart rc=0; shift 2
    log=$RESULTS/logs/${claim##*/}.log
    if [ -e "$done_file" ] || ! take "$claim"; then return 0; fi
    if [ ! -e "$done_file" ]; then
        printf '\n> %s\n' "$*"
        # The heart stops with this script, however that ends. Its output goes nowhere, or its sleep would hold a pipe open.
        (while sleep 20; do kill -0 $$ && [ -d "$claim" ] && touch "$claim" || exit; done) >/dev/null 2>&1 & heart=$!
        trap 'kill $heart 2>/dev/null; rmdir "$claim" 2>/dev/null' EXIT
        mkdir -p "$RESULTS/logs"
        "$@" 2>&1 | tee -ia "$log" || rc=${PIPESTATUS[0]}
        trap - EXIT
        kill $heart 2>/dev/null || true
        wait $heart 2>/dev/null || true
        [ $rc = 0 ] || failed+=("$*    (its output: $log)")
    fi
    rmdir "$claim" 2>/dev/null || true
    if [ $rc = 130 ] || [ $rc = 143 ] || $stopped; then echo "stopped; started again, it goes on from here" >&2; exit 130; fi  # Ctrl-C is for the whole list
}
count() {  # count FOLDER SCRIPT COST: for the summary of --dry-run, per figure, shared runs in each figure that shows them
    [ -z "${counted[$fig|$1]:-}" ] || return 0
    counted[$fig|$1]=1
    if [ "$2" = transfer.py ]; then transfers_of[$fig]=$((${transfers_of[$fig]:-0} + 1)); else runs_of[$fig]=$((${runs_of[$fig]:-0} + 1)); fi
    [ -z "${listed[$1]:-}" ] || return 0
    new_of[$fig]=$((${new_of[$fig]:-0} + 1))
    cost_of[$fig]="${cost_of[$fig]:-0} + $3"  # a sum for awk, worked out at the end
}
claim_of() { local name=${1//\//_}; printf '%s' "$RESULTS/claims/$name"; }
take() {  # take CLAIM: whether the claim is ours now. One whose heartbeat (its modification time) stopped is taken over
    mkdir -p "$RESULTS/claims"
    mkdir "$1" 2>/dev/null && return
    [ -n "$(find "$1" -maxdepth 0 -mmin +2 2>/dev/null)" ] || return 1
    mv "$1" "$1.dead.$$" 2>/dev/null || return 1
    if [ -z "$(find "$1.dead.$$" -maxdepth 0 -mmin +2)" ]; then mv -n "$1.dead.$$" "$1"; return 1; fi  # another copy had just taken it
    rmdir "$1.dead.$$" && mkdir "$1" 2>/dev/null
}
wait_for() {  # wait_for FILE FOLDER: while another copy is alive and making FILE
    $dry && return
    while [ ! -e "$1" ] && [ -d "$(claim_of "$2")" ] && [ -z "$(find "$(claim_of "$2")" -maxdepth 0 -mmin +2 2>/dev/null)" ]; do sleep 2; done
}

sat() {  # sat NAME |A|/N FLAG...: a run of sat.py on $dataset
    local name=$prefix$1 share=$2; shift 2
    stage "$RESULTS/$dataset/$name" result.json "$n * $epochs * (3 + ${attack_cost:-14} * $share)" \
        sat.py --config "$here/configs/$config.yaml" $dataset_flag --run "$name" "$@" $quick $EXTRA
}
transfer() {  # transfer NAME: the run NAME of $dataset as the source of a transfer to each of $targets
    local target source=$RESULTS/$dataset/$1
    if ! $dry && [ ! -e "$source/result.json" ] && [ -z "${2:-}" ]; then  # another copy has the source: later
        later+=("$dataset|$targets|$fig|$1")
        return
    fi
    wait_for "$source/result.json" "$source"
    for target in $targets; do
        if ! $dry && [ ! -e "$source/result.json" ]; then failed+=("transfer to $target of $source, which has no result"); continue; fi
        stage "$RESULTS/$target/$dataset-$1-seed0" result.json "${target_cost[$target]}" \
            transfer.py "$source/best.pt" --config "$here/configs/transfer/$target.yaml" --run "$dataset-$1-seed0" $quick $EXTRA
    done
}
late_transfers() {  # those whose source another copy was training
    local one name
    for one in "${later[@]}"; do
        IFS='|' read -r name targets fig one <<<"$one"
        use "$name" "$targets"
        transfer "$one" wait
    done
}
ranking() {  # the ranking of $dataset, which the orders below need
    local folder="$RESULTS/$dataset/rank-$arch-seed0" fig="$dataset: ranking (fig3)" cost=4
    [[ $metrics != *vog* ]] || cost=7
    stage "$folder" rank.json "$n * $epochs * $cost" rank.py --config "$here/configs/$config.yaml" $dataset_flag --metrics $metrics $EXTRA
    wait_for "$folder/rank.json" "$folder"
}

# --- the runs of the figures -------------------------------------------------------------------------------------------

orders() {  # orders COMMAND SIZE...: COMMAND SIZE ORDER SEED for each size, hardest, easiest and each random subset
    local command=$1 size seed; shift
    for size in "$@"; do
        $command "$size" hardest 0
        $command "$size" easiest 0
        for ((seed = 0; seed < seeds; seed++)); do $command "$size" random "$seed"; done
    done
}
baselines() { local fig="$dataset: baselines"; sat none-seed0 0 --split none; sat full-seed0 1 --split full; }
csat() { sat "csat-$2-$1$tag-seed$3" "$1 / $n_classes" --split csat --size "$1" --order "$2" --seed "$3" $extra; }
esat() { sat "esat-$2-$1$tag-seed$3" "$1" --split esat --frac "$1" --order "$2" --seed "$3" $extra; }
s_csat() { csat "$@"; transfer "${prefix}csat-$2-$1$tag-seed$3"; }
s_esat() { esat "$@"; transfer "${prefix}esat-$2-$1$tag-seed$3"; }
source_baselines() { baselines; transfer "${prefix}none-seed0"; transfer "${prefix}full-seed0"; }

fig2() { local c; baselines; for c in $classes; do sat "csat-$c-seed0" "1 / $n_classes" --split csat --classes "$c"; done; }
fig3() { ranking; }
fig5() { ranking; baselines; orders csat $sizes; }  # and 4, 13
fig6() { ranking; baselines; orders esat $fracs; }
fig7() {  # three loss weights; the vanilla runs are those of Fig. 5, the emphasis ones those of Fig. 15
    local size weight
    ranking
    source_baselines
    for weight in vanilla balanced emphasis; do
        local tag="-$weight" extra="--weight $weight"
        [ $weight != vanilla ] || tag='' extra=''
        for size in $sizes; do s_csat "$size" hardest 0; done
    done
}
fig8() { local tag=-emphasis extra='--weight emphasis'; ranking; source_baselines; orders s_esat $fracs; }  # and 14: other targets
seeds() { local order; for order in hardest easiest random; do esat "${fracs%% *}" $order 1; done; }  # a second seed of the smallest A
fig15() { local tag=-emphasis extra='--weight emphasis'; ranking; source_baselines; orders s_csat $sizes; }
fig12() {
    local metric frac
    ranking
    baselines
    for frac in $fracs; do esat "$frac" hardest 0; done
    for metric in svar vog; do
        local tag="-$metric" extra="--metric $metric"
        for frac in $fracs; do esat "$frac" hardest 0; done
    done
}
fig16() {
    local tag=-emphasis-fgsm-rs extra='--weight emphasis --attack fgsm-rs' attack_cost=2 frac
    ranking
    source_baselines
    for frac in $fracs; do s_esat "$frac" hardest 0; done
    tag=-emphasis extra='--weight emphasis' attack_cost=14
    for frac in $fracs; do s_esat "$frac" hardest 0; done
}

# --- data sets: Table 1 and 2 ------------------------------------------------------------------------------------------

declare -A target_cost=([cifar10]="50000 * 40" [svhn]="73257 * 40" [caltech256]="24485 * 100" [flowers102]="1020 * 100" [digits5-9]="648 * 20" [cifar10-small]="5000 * 15")

use() {  # use DATASET TARGETS: what the figures need to know of it
    dataset=$1 targets=$2 config=$1 dataset_flag='' quick='' prefix='' tag='' extra='' metrics='entropy svar'
    fracs='0.1 0.2 0.3 0.4 0.5 0.6 0.7 0.8 0.9' sizes='1 2 3 4 5 6 7 8 9' classes='' arch=preactresnet18 epochs=200
    case $1 in
        cifar10) n=50000 n_classes=10 seeds=10 classes='airplane automobile bird cat deer dog frog horse ship truck' ;;
        cifar100) n=50000 n_classes=100 seeds=5 metrics='entropy svar vog' sizes='10 20 30 40 50 60 70 80 90' ;;
        imagenet200) n=259906 n_classes=200 seeds=3 sizes='20 40 60 80 100 120 140 160 180' arch=resnet50 epochs=150 ;;
        digits | digits0-4)  # small: fewer sizes and seeds, the two APGD attacks on 200 examples (the tables say so)
            config=digits n=1297 n_classes=10 seeds=2 sizes='3 5 7' fracs='0.1 0.3 0.5' classes='0 1 2 3 4 5 6 7 8 9'
            arch=preactresnet8 epochs=30 metrics='entropy svar vog' prefix=quick- quick='--eval-attacks apgd-ce apgd-t --eval-n 200 --select-attacks apgd-ce' ;;
    esac
    case $1 in *-small)  # the paper's claims on a CPU: 5,000 + 1,000 real images, PreActResNet-8, 15 epochs, one random subset
        config=cifar10-small dataset_flag="--dataset $1" n=5000 n_classes=10 seeds=1 arch=preactresnet8 epochs=15
        fracs='0.1 0.3 0.5' classes='airplane automobile bird cat deer dog frog horse ship truck' ;;
    esac
    [ "$1" != cifar100-small ] || n_classes=100 sizes='10 30'
    [ "$1" != digits0-4 ] || { dataset_flag='--dataset digits0-4' n=649 n_classes=5 sizes='1 2 3' metrics='entropy svar'; }
}
figures() {  # figures DATASET TARGETS FIG...: those of the figures that were asked for (all, when none was)
    local name; use "$1" "$2"; shift 2
    for name in "$@"; do
        if [ ${#wanted[@]} -eq 0 ] || [[ " ${wanted[*]} " == *" $name "* ]]; then
            fig="$dataset${targets:+ -> $targets}: $name"
            case $name in fig4 | fig13) fig5 ;; fig14) fig8 ;; *) $name ;; esac
        fi
    done
}
section() {
    case $1 in
        cifar10) figures cifar10 '' fig2 fig3 fig4 fig5 fig6 fig13 ;;
        cifar100) figures cifar100 '' fig5 fig6 fig12 fig13 ;;
        imagenet200) figures imagenet200 '' fig5 fig6 fig13 ;;
        transfer)
            figures cifar100 cifar10 fig7 fig8 fig15 fig16
            figures cifar100 svhn fig14
            figures imagenet200 'caltech256 flowers102' fig8 fig15 fig16 ;;
        cifar10-small)
            figures cifar10-small '' fig2 fig3 fig6 seeds
            figures cifar100-small cifar10-small fig7 ;;
        digits)
            figures digits '' fig2 fig3 fig4 fig5 fig6 fig12 fig13
            figures digits0-4 digits5-9 fig7 fig8 fig14 fig15 fig16 ;;
    esac
}

main() {
    local sections=() word key
    wanted=()
    for word in "$@"; do
        case $word in
            --dry-run) dry=true ;;
            digits | cifar10-small | cifar10 | cifar100 | imagenet200 | transfer) sections+=("$word") ;;
            all) sections+=(cifar10 cifar100 imagenet200 transfer cifar10-small digits) ;;
            fig2 | fig3 | fig4 | fig5 | fig6 | fig7 | fig8 | fig12 | fig13 | fig14 | fig15 | fig16) wanted+=("$word") ;;
            *) echo "error: no section '$word'; valid: cifar10 cifar100 imagenet200 transfer cifar10-small digits all, then fig2-8 fig12-16, and --dry-run" >&2; exit 2 ;;
        esac
    done
    [ ${#sections[@]} -gt 0 ] || { echo "error: name a section: cifar10 cifar100 imagenet200 transfer cifar10-small digits all (and --dry-run)" >&2; exit 2; }
    for word in "${sections[@]}"; do section "$word"; done
    late_transfers
    local report=("$PYTHON" "$here/report.py" --results "$RESULTS")
    if $dry; then
        printf '%s\n' "${report[*]}"
        printf '# %-42s %6s %9s %6s %s\n' figure runs transfers new 'forward passes of the new ones (training: 3 + 14 |A|/N an example)'
        for key in "${!new_of[@]}" "${!runs_of[@]}" "${!transfers_of[@]}"; do
            printf '# %-42s %6d %9d %6d %10.3g\n' "$key" "${runs_of[$key]:-0}" "${transfers_of[$key]:-0}" "${new_of[$key]:-0}" "$(awk "BEGIN {print ${cost_of[$key]:-0}}")"
        done | sort -Vu
        return
    fi
    "${report[@]}"
    if [ ${#failed[@]} -gt 0 ]; then
        printf '\n%d failed:\n' "${#failed[@]}" >&2
        printf '  %s\n' "${failed[@]}" >&2
        exit 1
    fi
}
trap 'stopped=true' INT TERM
main "$@"
