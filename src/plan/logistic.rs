//! Launch plans of the logistic family.
