rule accuracy:
    message:
        "Comparing the accuracy of one device and of the split network, seed by seed."
    input:
        images=rules.data.output.images,
        calibration=calibration_of(STUDY.accuracy.network, STUDY.accuracy.device_set),
    output:
        store=directory(f"{OUT}/accuracy.zarr"),
    log:
        text=f"{LOGS}/accuracy.log",
        usage=f"{LOGS}/accuracy.usage.json",
    params:
        options=options(
            network=STUDY.accuracy.network,
            batch_size=STUDY.accuracy.batch_size,
            devices=STUDY.accuracy.device_set,
            strategy=STUDY.accuracy.strategies,
            epochs=STUDY.accuracy.epochs,
            train_images=STUDY.accuracy.train_images,
            test_images=STUDY.accuracy.test_images,
            seed=STUDY.accuracy.seeds,
            learning_rate=STUDY.training.learning_rate,
            momentum=STUDY.training.momentum,
            scheduler=STUDY.scheduler,
            keep=f"{OUT}/accuracy",
        ),
        code=code_digest("pipeline.cli.accuracy"),
    threads: workflow.cores
    conda:
        ENVIRONMENT
    shell:
        "PIPELINE_USAGE={log.usage:q}"
        " exec python -m pipeline accuracy {params.options} --data {input.images:q} --calibration {input.calibration:q}"
        " --output {output.store:q} 2> >(tee -i {log.text:q} >&2)"
