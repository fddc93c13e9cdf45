"""Submissions to the challenge servers: every fault of a results list at once, and its zip.

The validation sets of YouTube-VIS and OVIS are scored on servers that stop at the first fault, or
score a result as something else than was meant. The readers in `formats` stop at the first fault,
too; nothing stops here. `files` reads without judging and packs, `check` walks through the entries,
`report` holds the table of kinds of faults and counts them.

    expected = read_expected(Path("valid.json"))
    submission = open_submission(Path("results.json"), expected)
    report = check(submission, expected)
    if report.sound:
        pack(submission, report, Path("results.zip"))
"""
