# shellcheck shell=bash
# Functions of train.sh, slurm.sbatch and rank.sh.

# fail STATUS WHAT [LINE...]: one error, with what was given and what to do on lines of their own.
fail() {
    local status=$1
    printf 'error: %s\n' "$2" >&2
    shift 2
    [[ $# -eq 0 ]] || printf '  %s\n' "$@" >&2
    exit "$status"
}

# die WHAT [LINE...]: an error of whoever called: exit 2.
die() {
    fail 2 "$@"
}

# read_preset DIR: the flags of DIR/layout.args into the array `layout`.
# One flag with its values a line; values with spaces or signs of the shell are quoted. A comment is
# a line of its own, or stands at the end of a line and holds no quotes.
read_preset() {
    local file=$1/layout.args words
    [[ -n $1 ]] || die "no preset is given" \
        "allowed: a folder with a layout.args, as \`qwen35 plan --emit DIR\` writes it" \
        "fix: set PRESET, or name the folder"
    [[ -r $file ]] || die "the preset has no layout.args" "got: $1" \
        "fix: write one with \`qwen35 plan ... --emit $1\`"
    # also as an editor on Windows saves it
    words=$(sed -E $'1s/^\xef\xbb\xbf//; s/\r$//' "$file" |
        sed -E "/^[[:space:]]*(#|$)/d; s/[[:space:]]#[^'\"]*$//" |
        xargs -r printf '%s\n' 2>/dev/null) ||
        die "a quote in layout.args is not closed" "got: $file"
    [[ -n $words ]] || die "layout.args holds no flags" "got: $file"
    # shellcheck disable=SC2034 # for the script that sourced this
    mapfile -t layout <<<"$words"
}

# planned PRESET KEY: a number in its plan.json; nothing where there is no such file or key.
planned() {
    grep -oE "\"$2\": *[0-9]+" "$1/plan.json" 2>/dev/null | grep -oE '[0-9]+$' | head -n 1 || true
}

# check_gpus PRESET GPUS FIX: refuse a preset that was planned for another number of GPUs; FIX is
# what makes this run the right size. A folder with layout.args alone does not say its number.
check_gpus() {
    local gpus batch length kind model patches frozen
    gpus=$(planned "$1" gpus)
    [[ -n $gpus && $gpus != "$2" ]] || return 0
    batch=$(planned "$1" global_batch_size) length=$(planned "$1" seq_length)
    kind=$(grep -oE '"gpu": *"[^"]+"' "$1/plan.json" | cut -d '"' -f 4 || true)
    model="${layout[0]} $(printf %q "${layout[1]}")" # a plan begins with it
    patches=$(planned "$1" patches)
    if [[ -n $patches ]]; then
        frozen=$(sed -nE 's/^.* --vision --freeze//p' "$1/layout.args")
        model+=" --vision --image-patches $patches --images $(planned "$1" per_sequence)"
        model+=${frozen// / --freeze }
    fi
    die "the preset is planned for another number of GPUs" \
        "got: $1 for $gpus GPUs, and a run of $2" "allowed: $gpus GPUs" \
        "fix: $3; or plan for $2: qwen35 plan $model --gpus $2 --gpu $kind \\" \
        "    --seq-length $length --global-batch-size $batch --emit DIR"
}

# read_script: what Python trains with into the array `script`: SCRIPT, or this package's own loop.
# shellcheck disable=SC2034 # for the script that sourced this
read_script() {
    script=(-m qwen35_mcore.training.pretrain)
    [[ -n $SCRIPT ]] || return 0
    [[ -r $SCRIPT ]] || die "SCRIPT is not there" "got: $SCRIPT" \
        "allowed: a copy of examples/pretrain_qwen35.py" \
        "fix: correct it, or leave it out for the package's own training"
    script=("$SCRIPT")
}

# check_python: refuse an interpreter that cannot train; which has this package, with torch.
check_python() {
    local code='import sys, importlib.util as u
sys.exit(not all(map(u.find_spec, ("torch", "megatron", "qwen35_mcore"))))'
    # -P: a package that merely lies in this folder does not count
    ! "$PYTHON" -P -c "$code" >/dev/null 2>&1 || return 0
    local venv=$REPO/.venv make=''
    [[ -e $venv/bin/activate ]] || make="make -C $(printf %q "$REPO") install, then "
    die "this Python has no qwen35_mcore with megatron-core and torch" "got: PYTHON=$PYTHON" \
        "fix: ${make}source $(printf %q "$venv/bin/activate"), or set PYTHON to one that has them"
}

# run_flags: the flags of the paths at the top of a script into the array `paths`.
run_flags() {
    [[ -n $DATA ]] || die "DATA is not set" \
        "allowed: the prefix of a .bin/.idx pair, a blend ('0.3 first 0.7 second'), mock, or a" \
        "    folder of conversations" \
        "fix: tokenize text with \`qwen35 data tokenize\`, and set DATA to its --output-prefix"
    [[ -n $SAVE ]] || die "SAVE is not set" "fix: set it to the folder of this run's checkpoints"
    local from=$LOAD
    # LOAD is where the first start continues from; later ones must find what it saved
    [[ ! -e $SAVE/latest_checkpointed_iteration.txt ]] || from=$SAVE
    paths=(--save "$SAVE" --load "$from" --save-interval "$SAVE_INTERVAL"
        --tensorboard-dir "$TENSORBOARD")
    [[ -z $PRETRAINED ]] || paths+=(--pretrained-checkpoint "$PRETRAINED")
    if [[ $DATA == mock ]]; then
        paths+=(--mock-data)
        return
    fi
    # shards of conversations, or an Energon metadataset that blends several
    if [[ -d $DATA/.nv-meta || $DATA == *.yaml ]]; then
        paths+=(--image-data "$DATA")
        return
    fi
    local word words
    read -rd '' -a words <<<"$DATA" || true # of all its lines
    for word in "${words[@]}"; do
        [[ $word =~ ^[0-9.]+([eE][-+]?[0-9]+)?$ || (-e $word.bin && -e $word.idx) ]] || die "DATA names no dataset" \
            "got: $word" "allowed: a prefix with a .bin and an .idx file" \
            "fix: tokenize text with \`qwen35 data tokenize ... --output-prefix $word\`"
    done
    paths+=(--data-path "${words[@]}")
}
