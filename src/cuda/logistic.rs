//! The logistic family.
