rule configuration:
    message:
        "Writing down the whole configuration of this study."
    output:
        record=f"{OUT}/configuration.yaml",
    log:
        f"{LOGS}/configuration.log",
    params:
        study=STUDY.model_dump(mode="json"),
    localrule: True
    run:
        Path(output.record).write_text(yaml.safe_dump(params.study, sort_keys=False))


rule data:
    message:
        "Preparing the images once, for all jobs."
    output:
        images=f"{OUT}/data.zarr.zip",
    log:
        f"{LOGS}/data.log",
    params:
        data=STUDY.data,
        options=options(image_size=STUDY.image_size),
        code=code_digest("pipeline.cli.data"),
    conda:
        ENVIRONMENT
    shell:
        "exec python -m pipeline data {params.data:q} {params.options} --output {output.images:q}"
        " 2> >(tee -i {log:q} >&2)"
