"""From sidecars of finished runs to tables, figures and pages. It trains nothing and opens no dataset."""
