rule benchmark:
    message:
        "Timing {params.group}."
    input:
        images=rules.data.output.images,
        calibration=group_calibration,
    output:
        cells=directory(f"{OUT}/timing/{{group}}"),
    log:
        text=f"{LOGS}/timing/{{group}}.log",
        usage=f"{LOGS}/timing/{{group}}.usage.json",
    params:
        group=lambda wildcards: str(GROUPS[wildcards.group]),
        options=group_options,
        code=code_digest("pipeline.cli.benchmark"),
    # What is calibrated is timed next, before the host becomes faster or slower.
    priority: 1
    threads: workflow.cores
    conda:
        ENVIRONMENT
    shell:
        "PIPELINE_USAGE={log.usage:q}"
        " exec python -m pipeline benchmark {params.options} --data {input.images:q}"
        " --calibration {input.calibration:q} --output {output.cells:q} 2> >(tee -i {log.text:q} >&2)"


rule timing:
    message:
        "Combining all cells into the timing grid."
    input:
        cells=expand(rules.benchmark.output.cells, group=GROUPS),
        record=rules.configuration.output.record,
    output:
        store=directory(f"{OUT}/timing.zarr"),
    log:
        f"{LOGS}/timing.log",
    params:
        code=code_digest("pipeline.results.stores"),
    conda:
        ENVIRONMENT
    shell:
        "exec python -m pipeline combine {input.cells:q} --config {input.record:q} --output {output.store:q}"
        " 2> >(tee -i {log:q} >&2)"
