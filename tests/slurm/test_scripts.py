"""What the job scripts make of a site's settings and of a sweep's lines; the jobs themselves: test_jobs.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def bash(text, **variables):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "SLURM_JOB_ID": "7", **variables}
    command = ["bash", "-euo", "pipefail", "-c", text]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("recipe,folder", [("ultrachat", "ultrachat"), ("baselines/seqkd", "quickstart")])
def test_a_site_s_scratch_takes_the_place_of_the_folder_above_a_recipe_s_root(recipe, folder):
    """Also where that is another recipe's, whose models it reads."""
    said = bash(f"source slurm/site.sh; root_here {recipe}", SITE_SCRATCH="/scratch/me")
    assert said.stdout == f"root=/scratch/me/{folder}\n", said.stderr
    assert bash(f"source slurm/site.sh; root_here {recipe}").stdout == ""


def test_a_line_of_a_sweep_is_read_as_the_shell_reads_settings(tmp_path):
    lines = tmp_path / "lines.txt"
    lines.write_text("seed=1\nrun=two 'engine={name: deepspeed, zero_stage: 2}'\n")
    read = 'source slurm/job.sh; read_settings seed=5; printf "%s\\n" "${settings[@]}"'
    said = bash(read, SWEEP=str(lines), SLURM_ARRAY_TASK_ID="2", RECIPE="quickstart")
    assert said.stdout.splitlines()[1:] == ["seed=5", "run=two", "engine={name: deepspeed, zero_stage: 2}"], said.stderr
    missing = bash(read, SWEEP=str(lines), SLURM_ARRAY_TASK_ID="3", RECIPE="quickstart")
    assert missing.returncode == 2 and "no line 3" in missing.stderr


def test_a_recipe_without_stages_is_no_chain_and_nothing_is_submitted(tmp_path):
    alone = tmp_path / "alone.yaml"
    alone.write_text(f"extends: {REPOSITORY}/recipes/quickstart.yaml\npipeline: []\n")
    said = bash(f"slurm/submit.sh {alone}", SITE_VENV=str(Path(sys.prefix)))
    assert said.returncode == 2 and "has no pipeline" in said.stderr and not said.stdout, said.stderr
