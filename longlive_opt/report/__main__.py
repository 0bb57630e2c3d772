"""The command `python -m longlive_opt.report`: a campaign's log, or the results table of the README."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError
from .campaign import load
from .log.document import LOG_NAME, save_figures, write_campaign_log
from .readme import write_readme

log = logging.getLogger("longlive_opt.report")


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite a campaign's decisions, log, table and figures. Exit status 2 for wrong input."""
    parser = argparse.ArgumentParser(prog="python -m longlive_opt.report", description=main.__doc__)
    parser.add_argument("campaign", type=Path, metavar="CAMPAIGN_DIR", help="for example outputs/demo")
    parser.add_argument("--log", type=Path, metavar="PATH", help=f"default: {LOG_NAME} in CAMPAIGN_DIR")
    parser.add_argument("--readme", type=Path, metavar="PATH",
                        help="only write the results table into this page, between its markers")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        folder = arguments.campaign.resolve()
        campaign = load(folder)
        if not any((campaign.results, campaign.failures, campaign.problems)):
            raise UserError(f"{arguments.campaign}: holds no result.json and no failed.json, so it is no "
                            "campaign; name a folder such as outputs/demo")
        if arguments.readme:
            write_readme(arguments.readme.resolve(), campaign)
            return 0
        charts = save_figures(campaign)
        path = write_campaign_log(campaign, arguments.log.resolve() if arguments.log else "")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    log.info("%s: %d results, %d failed, %d not usable, %d figures", path.name, len(campaign.results),
             len(campaign.failures), len(campaign.problems), len(charts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
