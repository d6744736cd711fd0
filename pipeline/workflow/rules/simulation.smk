rule simulation:
    message:
        "Simulating devices and links that are not there."
    input:
        calibrations=simulation_calibrations(),
        record=rules.configuration.output.record,
    output:
        store=directory(f"{OUT}/simulation.zarr"),
    log:
        text=f"{LOGS}/simulation.log",
        usage=f"{LOGS}/simulation.usage.json",
    params:
        calibrations=lambda wildcards, input: options(calibration=tuple(input.calibrations)),
        code=code_digest("pipeline.cli.simulate"),
    threads: workflow.cores
    conda:
        ENVIRONMENT
    shell:
        "PIPELINE_USAGE={log.usage:q}"
        " exec python -m pipeline simulate {params.calibrations} --config {input.record:q} --output {output.store:q}"
        " 2> >(tee -i {log.text:q} >&2)"
