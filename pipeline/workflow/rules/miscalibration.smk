rule miscalibration:
    message:
        "Timing plans from a calibration that misjudges a device."
    input:
        images=rules.data.output.images,
        calibration=calibration_of(STUDY.miscalibration.network, STUDY.miscalibration.device_set),
    output:
        store=directory(f"{OUT}/miscalibration.zarr"),
    log:
        text=f"{LOGS}/miscalibration.log",
        usage=f"{LOGS}/miscalibration.usage.json",
    params:
        options=options(
            network=STUDY.miscalibration.network,
            batch_size=STUDY.miscalibration.batch_size,
            devices=STUDY.miscalibration.device_set,
            device=STUDY.miscalibration.device,
            error=STUDY.miscalibration.errors,
            strategy=STUDY.miscalibration.strategies,
            warmup=STUDY.timing.warmup,
            rounds=STUDY.timing.rounds,
            repetitions=STUDY.timing.repetitions,
            seconds=STUDY.timing.seconds,
            seed=STUDY.timing.seed,
            learning_rate=STUDY.training.learning_rate,
            momentum=STUDY.training.momentum,
            scheduler=STUDY.scheduler,
        ),
        code=code_digest("pipeline.cli.miscalibration"),
    threads: workflow.cores
    conda:
        ENVIRONMENT
    shell:
        "PIPELINE_USAGE={log.usage:q} exec python -m pipeline miscalibration {params.options} --data {input.images:q}"
        " --calibration {input.calibration:q} --output {output.store:q} 2> >(tee -i {log.text:q} >&2)"
