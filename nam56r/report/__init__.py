"""What people read: plan tables, and pages made of measured results."""
