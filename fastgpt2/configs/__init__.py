"""Named training configurations, as TOML."""
