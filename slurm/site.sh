# The site's settings, for submit.sh and for the jobs. Runs in the repository.

say() { echo "$(date +%T) $*"; }
fail() { say "$1" >&2; exit "${2:-2}"; }

# Read the site's settings and have its python.
read_site() {
    if [ -f slurm/site.env ]; then
        set -a && source slurm/site.env && set +a
    fi
    local name
    for name in ${SITE_MODULES:-}; do module load "$name" || fail "slurm/site.env: no module $name."; done
    source "${SITE_VENV:-.venv}/bin/activate" || fail "slurm/site.env: SITE_VENV holds no environment. Run make install."
}

# Say where this site wants what a recipe makes: the last folder of its root, under SITE_SCRATCH. Nothing if that is unset.
root_here() {
    [ -n "${SITE_SCRATCH:-}" ] || return 0
    local root
    root=$(python -c 'import sys; from deltakd.recipe.load import load_recipe; print(load_recipe(sys.argv[1]).root)' "$1") || return
    echo "root=$SITE_SCRATCH/$(basename "$root")"
}
