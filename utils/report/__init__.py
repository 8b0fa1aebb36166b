"""The report: figures from records and history, and the page that shows them."""
