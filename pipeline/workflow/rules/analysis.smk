rule figures:
    message:
        "Drawing the figures and the headline table."
    input:
        timing=rules.timing.output.store,
        accuracy=rules.accuracy.output.store,
        calibration=rules.calibration.output.store,
        simulation=rules.simulation.output.store,
        captions=expand(FOLDER / "report" / "{name}.rst", name=FIGURES),
        miscalibration=rules.miscalibration.output.store,
        record=rules.configuration.output.record,
    output:
        headline=report(f"{OUT}/figures/headline.html", caption="../report/headline.rst", category="Headline"),
        figures=[
            report(
                f"{OUT}/figures/{name}.svg",
                caption=f"../report/{name}.rst",
                category="Figures",
                labels={"figure": name.replace("_", " ")},
            )
            for name in FIGURES
        ],
        images=expand(f"{OUT}/figures/{{name}}.png", name=FIGURES),
        findings=expand(f"{OUT}/figures/{{name}}.rst", name=["headline", "usage", *FIGURES]),
        page=f"{OUT}/figures/study.rst",
        tables=multiext(f"{OUT}/figures/headline", ".csv", ".md"),
        predictions=expand(
            f"{OUT}/figures/{{name}}",
            name=[
                "predictions.csv",
                "predictions_far_off.csv",
                "predicted_kinds.csv",
                "predicted_instructions.csv",
                "prediction_table.rst",
                "predicted_instructions_table.rst",
            ],
        ),
    log:
        f"{LOGS}/figures.log",
    params:
        study=subpath(input.timing, parent=True),
        code="".join(
            code_digest(f"pipeline.analysis.{name}") for name in ("sections", "tables", "prediction_tables", "usage")
        ),
    conda:
        ENVIRONMENT
    shell:
        "exec python -m pipeline figures {params.study:q} 2> >(tee -i {log:q} >&2)"


rule report:
    message:
        "Writing the report."
    input:
        headline=rules.figures.output.headline,
        figures=rules.figures.output.figures,
        findings=rules.figures.output.findings,
        page=rules.figures.output.page,
        predictions=rules.figures.output.predictions,
        record=rules.configuration.output.record,
        captions=expand(FOLDER / "report" / "{name}.rst", name=["study", "headline", *FIGURES]),
    output:
        html=f"{OUT}/report.html",
    log:
        f"{LOGS}/report.log",
    params:
        study=subpath(input.record, parent=True),
        snakefile=workflow.main_snakefile,
        code=code_digest("pipeline.analysis.report"),
    conda:
        ENVIRONMENT
    shell:
        "exec python -m pipeline report {params.study:q} --snakefile {params.snakefile:q} --output {output.html:q}"
        " 2> >(tee -i {log:q} >&2)"


rule notebook:
    message:
        "Executing the analysis notebook."
    input:
        template=FOLDER / "notebooks" / "analysis.ipynb",
        timing=rules.timing.output.store,
        simulation=rules.simulation.output.store,
    output:
        notebook=f"{OUT}/analysis.ipynb",
    log:
        f"{LOGS}/analysis.log",
    params:
        study=subpath(input.timing, parent=True),
        code=code_digest("pipeline.analysis.report"),
    conda:
        ENVIRONMENT
    shell:
        "exec python -m pipeline notebook {input.template:q} {params.study:q} --output {output.notebook:q}"
        " 2> >(tee -i {log:q} >&2)"
