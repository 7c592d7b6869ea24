"""The commands of `mocosfl-priv`, grouped by topic; `mocosfl_priv.cli` assembles them."""
