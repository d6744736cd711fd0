rule benchmark:
    message:
        "Timing {params.cell}."
    input:
        images=rules.data.output.images,
        calibration=cell_calibration,
    output:
        cell=f"{OUT}/timing/{{cell}}.zarr.zip",
    log:
        f"{LOGS}/timing/{{cell}}.log",
    params:
        cell=lambda wildcards: str(CELLS[wildcards.cell][0]),
        options=cell_options,
        code=code_digest("pipeline.cli.benchmark"),
    threads: workflow.cores
    conda:
        ENVIRONMENT
    shell:
        "exec python -m pipeline benchmark {params.options} --data {input.images:q}"
        " --calibration {input.calibration:q} --output {output.cell:q} 2> >(tee -i {log:q} >&2)"


rule timing:
    message:
        "Combining all cells into the timing grid."
    input:
        cells=expand(rules.benchmark.output.cell, cell=CELLS),
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
