# Checks that the checkpoints of FLEET_MODEL are readable and complete. Otherwise prints the path and exits with 1.
# A name without a slash is a model that ships in the image.
fail() {
    echo "weights: $1 is $2; mount a volume with Diffusers directories there" >&2
    exit 1
}

# A safetensors file begins with the length of its header; the header contains the end offset of each tensor.
check_file() {
    [ -s "$1" ] || fail "$1" "empty"
    header=$(od -An -tu8 -N8 "$1" 2>/dev/null) || fail "$1" "not readable"
    header=${header##* }
    [ "${#header}" -le 9 ] || fail "$1" "not a safetensors file"
    end=$(head -c "$((header + 8))" "$1" | tail -c +9 | tr -d ' \n' | grep -aoE '"data_offsets":\[[0-9]+,[0-9]+' |
        sed 's/.*,//' | sort -n | tail -n 1)
    whole=$((8 + header + ${end:-0}))
    size=$(wc -c <"$1")
    [ "$size" -eq "$whole" ] || fail "$1" "damaged ($size bytes; its header announces $whole)"
}

set -f
IFS=,
for model in $FLEET_MODEL; do
    folder=${model#*=}
    case $folder in */*) ;; *) continue ;; esac
    [ -d "$folder" ] || fail "$folder" "not a directory"
    [ -r "$folder/model_index.json" ] || fail "$folder/model_index.json" "not readable"
    unreadable=$(find -L "$folder" '(' ! -readable -o -type d ! -executable ')' -print -quit 2>/dev/null)
    [ -z "$unreadable" ] || fail "$unreadable" "not readable"
    weights=$(find -L "$folder" -name '*.safetensors' | sort)
    [ -n "$weights" ] || fail "$folder" "without *.safetensors files"
    echo "$weights" | while read -r file; do check_file "$file"; done || exit 1
done
