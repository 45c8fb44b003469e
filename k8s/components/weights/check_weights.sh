# Checks that the checkpoints of FLEET_MODEL are there and readable. Exit code 1 and one line that names the path if not.
# A name without a slash is a model that ships in the image.
fail() {
    echo "weights: $1 is $2; mount a volume with Diffusers directories there" >&2
    exit 1
}

for model in $(echo "$FLEET_MODEL" | tr ',' ' '); do
    folder=${model#*=}
    case $folder in */*) ;; *) continue ;; esac
    [ -d "$folder" ] || fail "$folder" "not a directory"
    [ -r "$folder/model_index.json" ] || fail "$folder/model_index.json" "not readable"
    weights=$(find -L "$folder" -name '*.safetensors' | sort)
    [ -n "$weights" ] || fail "$folder" "without *.safetensors files"
    echo "$weights" | while read -r file; do
        head -c 8 "$file" >/dev/null 2>&1 || fail "$file" "not readable"
        [ -s "$file" ] || fail "$file" "empty"
    done || exit 1
done
