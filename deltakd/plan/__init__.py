"""What a training will take, by arithmetic, before any accelerator is booked. Imports no torch."""
