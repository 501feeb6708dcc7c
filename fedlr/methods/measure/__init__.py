"""How far an aggregate is from the ideal one; for records, never for a decision of the rule."""
