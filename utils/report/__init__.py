"""The report: figures from the records, and the page that shows them."""
