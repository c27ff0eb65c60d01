//! Loss curves as an SVG picture.

use std::path::Path;

use anyhow::{Context, Result};
use plotters::prelude::*;

pub struct Panel {
    pub title: String,
    pub x: &'static str,
    pub lines: Vec<Line>,
    /// A place on the x axis, and what happened there.
    pub mark: Option<(usize, String)>,
}

pub struct Line {
    pub label: String,
    /// Finite and above 0: a logarithmic axis shows nothing else.
    points: Vec<(f64, f64)>,
}

impl Line {
    pub fn new(label: String, values: &[f32]) -> Self {
        let points = values
            .iter()
            .enumerate()
            .filter(|(_, loss)| loss.is_finite() && **loss > 0.)
            .map(|(index, loss)| ((index + 1) as f64, f64::from(*loss)))
            .collect();
        Self { label, points }
    }
}

const WIDTH: u32 = 520;
const HEIGHT: u32 = 340;
const COLOURS: [RGBColor; 3] = [RGBColor(31, 119, 180), RGBColor(214, 39, 40), RGBColor(44, 160, 44)];
const FONT: &str = "sans-serif";

pub fn write(path: &Path, panels: &[Panel]) -> Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    }
    let columns = panels.len().clamp(1, 2);
    let rows = panels.len().div_ceil(columns).max(1);
    let size = (WIDTH * columns as u32, HEIGHT * rows as u32);
    let root = SVGBackend::new(path, size).into_drawing_area();
    root.fill(&WHITE)?;
    for (panel, area) in panels.iter().zip(root.split_evenly((rows, columns))) {
        draw(panel, &area).with_context(|| panel.title.clone())?;
    }
    root.present().with_context(|| path.display().to_string())
}

fn draw<B: DrawingBackend>(panel: &Panel, area: &DrawingArea<B, plotters::coord::Shift>) -> Result<()>
where
    B::ErrorType: 'static,
{
    let points = || panel.lines.iter().flat_map(|line| &line.points);
    let right = points().map(|point| point.0).fold(2., f64::max);
    let low = points().map(|point| point.1).fold(1., f64::min).max(1e-9);
    let high = points().map(|point| point.1).fold(low * 10., f64::max);
    let mut chart = ChartBuilder::on(area)
        .caption(&panel.title, (FONT, 16))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(58)
        .build_cartesian_2d(1f64..right, (low..high).log_scale())?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .x_desc(panel.x)
        .y_desc("loss in nats")
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_label_formatter(&|y| format!("{}", *y as f32))
        .draw()?;
    if let Some((at, text)) = &panel.mark {
        let at = *at as f64;
        let style = BLACK.mix(0.6);
        chart.draw_series(LineSeries::new([(at, low), (at, high)], style))?;
        let label = Text::new(text.clone(), (at + right * 0.01, high), (FONT, 13));
        chart.draw_series([label])?;
    }
    for (line, colour) in panel.lines.iter().zip(COLOURS.iter().cycle()) {
        chart
            .draw_series(LineSeries::new(line.points.clone(), colour))?
            .label(&line.label)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .label_font((FONT, 13))
        .draw()?;
    Ok(())
}
