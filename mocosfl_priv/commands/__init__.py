"""The commands, by what they are about; `mocosfl_priv.cli` puts them together."""
