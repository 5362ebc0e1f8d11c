//! Regions and the cloud regions that belong to each: explicit lists, never a prefix match.
//! (eu-west-2 is the UK, eu-central-2 Switzerland, ap-northeast-2 Korea: outside.)

use serde::{Deserialize, Serialize};

/// A jurisdiction that hosts tenants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Region {
    Us,
    Eu,
    Au,
    Jp,
}

impl Region {
    pub fn name(self) -> &'static str {
        match self {
            Region::Us => "us",
            Region::Eu => "eu",
            Region::Au => "au",
            Region::Jp => "jp",
        }
    }

    /// The cloud regions whose territory is this jurisdiction's.
    pub fn cloud_regions(self) -> &'static [&'static str] {
        match self {
            Region::Us => &["us-east-1", "us-east-2", "us-west-1", "us-west-2"],
            Region::Eu => &[
                "eu-west-1",
                "eu-west-3",
                "eu-central-1",
                "eu-north-1",
                "eu-south-1",
                "eu-south-2",
            ],
            Region::Au => &["ap-southeast-2", "ap-southeast-4"],
            Region::Jp => &["ap-northeast-1", "ap-northeast-3"],
        }
    }

    /// `Ok` when `cloud_region` lies in this jurisdiction; the error names both.
    pub fn admits(self, what: &str, cloud_region: &str) -> Result<(), String> {
        if self.cloud_regions().contains(&cloud_region) {
            return Ok(());
        }
        Err(format!(
            "{what} lies in cloud region {cloud_region}, outside jurisdiction {self}; allowed are {}",
            self.cloud_regions().join(", ")
        ))
    }
}

impl std::fmt::Display for Region {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Region {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        [Region::Us, Region::Eu, Region::Au, Region::Jp]
            .into_iter()
            .find(|r| r.name() == s)
            .ok_or_else(|| format!("\"{s}\" is not a region; use us, eu, au or jp"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_by_name_are_refused() {
        for outside in ["eu-west-2", "eu-central-2", "eu-west-11", "eu", ""] {
            assert!(Region::Eu.admits("bucket", outside).is_err(), "{outside}");
        }
        assert!(Region::Jp.admits("key", "ap-northeast-2").is_err());
        assert!(Region::Eu.admits("key", "eu-central-1").is_ok());
    }
}
