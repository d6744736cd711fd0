rule calibrate:
    message:
        "Measuring what each device and link does for {params.network} on {params.devices}."
    input:
        images=rules.data.output.images,
    output:
        calibration=f"{OUT}/calibration/{{calibration}}.zarr.zip",
    log:
        text=f"{LOGS}/calibration/{{calibration}}.log",
        usage=f"{LOGS}/calibration/{{calibration}}.usage.json",
    params:
        network=lambda wildcards: CALIBRATIONS[wildcards.calibration][0],
        devices=lambda wildcards: CALIBRATIONS[wildcards.calibration][1],
        options=options(
            scheduler=STUDY.scheduler,
            batch_size=STUDY.calibration.batch_size,
            fraction=STUDY.calibration.fractions,
            repetitions=STUDY.calibration.repetitions,
        ),
        code=code_digest("pipeline.cli.calibrate"),
    threads: workflow.cores
    conda:
        ENVIRONMENT
    shell:
        "PIPELINE_USAGE={log.usage:q}"
        " exec python -m pipeline calibrate --force --network {params.network:q} --devices {params.devices:q} {params.options}"
        " --data {input.images:q} --output {output.calibration:q} 2> >(tee -i {log.text:q} >&2)"


rule calibration:
    message:
        "Combining the calibrations into one store."
    input:
        calibrations=expand(rules.calibrate.output.calibration, calibration=CALIBRATIONS),
        record=rules.configuration.output.record,
    output:
        store=directory(f"{OUT}/calibration.zarr"),
    log:
        f"{LOGS}/calibration.log",
    params:
        code=code_digest("pipeline.results.stores"),
    conda:
        ENVIRONMENT
    shell:
        "exec python -m pipeline combine {input.calibrations:q} --config {input.record:q} --output {output.store:q}"
        " 2> >(tee -i {log:q} >&2)"
