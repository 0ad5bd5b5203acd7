// NOT RUN HERE: the Nextflow engine could not be had when this was written. See ../README.md.

// One slide. What wsi-run makes lies in `out`, a folder that all tasks see; the output is a copy of
// the slide's report, which is there if and only if the slide is done.
process WSI_RUN {
    tag "${slide_id}"

    input:
    tuple val(slide_id), val(shard)
    val list
    val out

    output:
    path 'receipt.json', emit: receipt

    script:
    """
    ${task.ext.run ?: 'wsi-run'} '${list}' --out '${out}' --shard ${shard} \\
        --workers ${task.cpus} --no-progress ${task.ext.args ?: ''}
    cp '${out}/reports/${slide_id}.json' receipt.json
    """
}

// One row a slide, failed ones included. Exit code 1 if any slide is not done.
process WSI_SUMMARY {
    cache false

    input:
    val receipts
    val out

    output:
    val out

    script:
    """
    ${task.ext.summary ?: 'wsi'} summary '${out}' --check
    """
}
