"""Every fault of training data before training meets it: annotations, images, frames of videos.

report = check_stills(Path("instances_train2017.json"), None)
for finding in report.findings:
    print(finding.severity, finding.kind.what, finding.count, finding.examples[0])
"""

from pmvis_core.data_check.report import KINDS, Finding, Report
from pmvis_core.data_check.stills import check_stills
from pmvis_core.data_check.videos import check_videos

__all__ = ["KINDS", "Finding", "Report", "check_stills", "check_videos"]
