#!/usr/bin/env nextflow
// NOT RUN HERE: the Nextflow engine could not be had when this was written. See README.md.
//
//   nextflow run workflows/nextflow --slides slides.csv --out results -profile slurm,apptainer

include { WSI_RUN; WSI_SUMMARY } from './modules/wsi'

// Slide ids as wsi-run makes them: given in the list, or the file name without its last extension.
def slide_ids(list) {
    def rows = list.name.toLowerCase().endsWith('.csv')
        ? list.splitCsv(header: true, strip: true)
        : list.readLines().findAll { line -> !line.trim().startsWith('#') }.collect { line -> [path: line.trim()] }
    return rows
        .findAll { row -> row.path }
        .collect { row -> row.slide_id ?: row.path.tokenize('/').last().replaceFirst(/(?<=.)\.[^.]*$/, '') }
        .unique()
        .sort()
}

workflow {
    if (!params.slides || !params.out) {
        error("say --slides LIST.csv (or .txt) and --out FOLDER")
    }
    def list = file(params.slides, checkIfExists: true)
    def out = file(params.out).toAbsolutePath().toString()
    def ids = slide_ids(list)

    // Every task is given the whole list and its place in it: the tasks agree on one run, a list's
    // own mpp and masks count, and no two tasks have a slide in common. The list and the results
    // are passed by name, not staged: a slide that is tried again has to find its finished blocks,
    // and a list's relative paths begin at the list.
    def tasks = (0..<ids.size()).collect { i -> [ids[i], "${i}/${ids.size()}".toString()] }
    WSI_RUN(channel.fromList(tasks), list.toAbsolutePath().toString(), out)

    // Slides that fail are ignored above, so that the others go on; this tells, and fails.
    WSI_SUMMARY(WSI_RUN.out.receipt.collect().ifEmpty([]), out)
}
