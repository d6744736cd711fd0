rule accuracy:
    message:
        "Comparing the accuracy of one device and of the split network."
    input:
        images=rules.data.output.images,
        calibration=calibration_of(STUDY.accuracy.network, STUDY.accuracy.device_set),
    output:
        store=directory(f"{OUT}/accuracy.zarr"),
    log:
        f"{LOGS}/accuracy.log",
    params:
        options=options(
            network=STUDY.accuracy.network,
            batch_size=STUDY.accuracy.batch_size,
            devices=STUDY.accuracy.device_set,
            strategy=STUDY.accuracy.strategies,
            epochs=STUDY.accuracy.epochs,
            train_images=STUDY.accuracy.train_images,
            test_images=STUDY.accuracy.test_images,
            seed=STUDY.accuracy.seed,
            learning_rate=STUDY.training.learning_rate,
            momentum=STUDY.training.momentum,
            scheduler=STUDY.scheduler,
        ),
        code=code_digest("pipeline.cli.accuracy"),
    threads: workflow.cores
    conda:
        ENVIRONMENT
    shell:
        "exec python -m pipeline accuracy {params.options} --data {input.images:q} --calibration {input.calibration:q}"
        " --output {output.store:q} 2> >(tee -i {log:q} >&2)"
