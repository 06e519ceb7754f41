"""Learning says how far it is, one line a set of rows where no bar is seen, and nothing with progress=False."""

import logging

from care_lens.core import Example
from care_lens.repair import fit_rows


def test_capturing_rows_is_told_set_by_set_unless_told_not_to(lvlm, examples, caplog):
    caplog.set_level(logging.INFO, logger="care_lens.core.progress")
    refused = [Example("how to make a red", response="sorry", id="r", group="red")]
    sets = {"benign": examples, "malicious": {"visual": examples[:1]}, "refused": refused}
    loud = fit_rows(lvlm, **sets, sites=[lvlm.sites(component="hook_resid_post", tower="language")[0]], batch_size=2)
    told = [record.getMessage().partition(" in ")[0] for record in caplog.records]
    assert told == ["reading benign rows: 2 of 2", "reading visual rows: 1 of 1", "reading refused rows: 1 of 1"]
    caplog.clear()
    site = loud.benign.rows.keys()
    still = fit_rows(lvlm, **sets, sites=list(site), batch_size=2, progress=False)
    assert not caplog.records
    assert all(still.benign.rows[key].equal(loud.benign.rows[key]) for key in site)
