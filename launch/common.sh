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
    words=$(sed -E "/^[[:space:]]*(#|$)/d; s/[[:space:]]#[^'\"]*$//" "$file" |
        xargs -r printf '%s\n' 2>/dev/null) ||
        die "a quote in layout.args is not closed" "got: $file"
    [[ -n $words ]] || die "layout.args holds no flags" "got: $file"
    # shellcheck disable=SC2034 # for the script that sourced this
    mapfile -t layout <<<"$words"
}

# run_flags: the flags of the paths at the top of a script into the array `paths`.
run_flags() {
    [[ -n $DATA ]] || die "DATA is not set" \
        "allowed: the prefix of a .bin/.idx pair, a blend ('0.3 first 0.7 second'), or mock" \
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
    local word words
    read -ra words <<<"$DATA"
    for word in "${words[@]}"; do
        [[ $word =~ ^[0-9.]+$ || (-e $word.bin && -e $word.idx) ]] || die "DATA names no dataset" \
            "got: $word" "allowed: a prefix with a .bin and an .idx file" \
            "fix: tokenize text with \`qwen35 data tokenize ... --output-prefix $word\`"
    done
    paths+=(--data-path "${words[@]}")
}
