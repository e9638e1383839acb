"""What people look at: the plan as a table, the model card, the report with its figures."""
