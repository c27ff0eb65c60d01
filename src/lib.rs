#![allow(dead_code)]
mod cpu;
mod reduction;
mod softmax;
