"""The study, end to end: `snakemake --cores all` measures, compares and draws; results are in outputs/.

Change one value with `--config data=FOLDER`; the full grid is `--configfile pipeline/workflow/config/paper.yaml`,
that of GPUs gpu.yaml beside it.
"""

from snakemake.utils import min_version

min_version("9.20")


# An own list of experiments replaces the default ones; it is not laid over them.
if "experiments" not in config:

    configfile: f"{workflow.basedir}/pipeline/workflow/config/default.yaml"


include: "pipeline/workflow/rules/common.smk"
include: "pipeline/workflow/rules/data.smk"
include: "pipeline/workflow/rules/calibration.smk"
include: "pipeline/workflow/rules/simulation.smk"
include: "pipeline/workflow/rules/timing.smk"
include: "pipeline/workflow/rules/accuracy.smk"
include: "pipeline/workflow/rules/miscalibration.smk"
include: "pipeline/workflow/rules/analysis.smk"


report: "pipeline/workflow/report/study.rst"


onstart:
    progress.follow(parts_to_do())


rule all:
    default_target: True
    input:
        rules.calibration.output.store,
        rules.timing.output.store,
        rules.simulation.output.store,
        rules.accuracy.output.store,
        rules.miscalibration.output.store,
        rules.report.output.html,
        rules.notebook.output.notebook,
